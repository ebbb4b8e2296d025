"""The commands, one file each: SUMMARY, `define(values)` its flags, `run(values)` what it does and prints.

Each file imports what it runs inside `run`, so that help and wrong flags answer at once.
"""

# In the order of `cdlm --help`: name -> module here.
COMMANDS = {
    "quickstart": "quickstart",
    "pretrain": "pretrain",
    "collect": "collect",
    "distill": "distill",
    "generate": "generate",
    "evaluate": "evaluate",
    "benchmark": "benchmark",
    "lm-eval": "lm_eval",
    "export": "export",
    "plan": "plan",
}
HELP = {"--help", "-h", "--helpfull"}
CONTINUED = ("quickstart", "pretrain", "collect", "distill")  # by the same command, where they were interrupted
ANSWERING = ("generate", "evaluate", "benchmark")  # so are these, with --output
INCOMPLETE = 1  # exit status: some of what was asked could not be answered
