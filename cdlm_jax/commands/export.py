"""`cdlm export`."""

from absl import flags

from cdlm_jax.commands.groups import Group
from cdlm_jax.config import InputError

SUMMARY = "write a model folder with another dtype"


def define(values: flags.FlagValues) -> None:
    Group(values, "model").text("model", None, "Model folder.")
    output = Group(values, "output")
    output.text("output", None, "New folder.")
    output.text("dtype", None, "float32 or bfloat16 [as stored].")


def run(values: flags.FlagValues) -> None:
    import jax

    from cdlm_jax.mesh.sharding import MeshConfig, make_mesh
    from cdlm_jax.models.model_folder import ModelFolder

    if values.model is None or values.output is None:
        raise InputError("give --model and --output")
    with jax.set_mesh(make_mesh(MeshConfig())):
        ModelFolder.load(values.model).save(values.output, dtype=values.dtype)
    print(f"wrote {values.output}")
