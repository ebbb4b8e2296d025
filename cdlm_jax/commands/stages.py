"""The three stages of a recipe run alike: `cdlm pretrain`, `collect` and `distill` are one line each."""

import contextlib

from absl import flags

from cdlm_jax.commands.common import define_processes, join, recipe
from cdlm_jax.commands.configs import define_config
from cdlm_jax.commands.groups import Group
from cdlm_jax.mesh import preemption


def define_stage(values: flags.FlagValues) -> None:
    define_config(values, "tiny")
    define_processes(values)


def define_training(values: flags.FlagValues) -> None:
    define_stage(values)
    Group(values, "output").switch("profile", False, "Write an XProf trace of 3 steps under the work folder.")


def run_stage(name: str, values: flags.FlagValues) -> None:
    """Run a stage (of `recipes.recipe`, by name) on the recipe of --config."""
    import jax

    from cdlm_jax.mesh.distributed import is_main
    from cdlm_jax.mesh.sharding import make_mesh
    from cdlm_jax.recipes import recipe as stages

    settings = recipe(values)
    join(values)
    if is_main():
        print(f"{name}: everything is written under {settings.folder}")
    options = {"profile": values.profile} if "profile" in values else {}
    # Alone, a process stops at once where it is not training; several stop where they agree to.
    told = preemption.noticed() if jax.process_count() > 1 else contextlib.nullcontext()
    with told, jax.set_mesh(make_mesh(settings.mesh)):
        getattr(stages, name)(settings, **options)
