"""Devices, processes, machines: where a program runs."""
