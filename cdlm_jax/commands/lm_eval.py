"""`cdlm lm-eval`: lm-evaluation-harness, which parses its own arguments."""

from cdlm_jax.commands.parsing import program_arguments

SUMMARY = "lm-evaluation-harness with --model cdlm_jax; its own arguments"

define = None


def run(arguments: list[str]) -> None:
    import cdlm_jax.evaluation.lm_eval_adapter  # noqa: F401  registers the model, or says what is missing

    with program_arguments(["cdlm lm-eval", *arguments]):
        from lm_eval.__main__ import cli_evaluate  # only now: the line above is the one that explains its absence

        cli_evaluate()
