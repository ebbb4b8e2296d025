"""--config: a config file, or one of this project's by name, from any working folder."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from cdlm_jax.config import InputError
from cdlm_jax.files import check_regular


def define_config(values: flags.FlagValues, default: str) -> None:
    """default: one of this project's, such as `tiny:quick`."""
    text = f"A file, or {', '.join(own())}; name:variant [{default}]. Overrides: --config.key=value."
    config_flags.DEFINE_config_file("config", find(default), text, flag_values=values)
    values.register_flag_by_module("recipe", values["config"])


def own() -> dict[str, Path]:
    """This project's configs: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).parent.parent
    inside, beside = package / "configs", package.parent / "configs"
    return {path.stem: path for path in sorted((inside if inside.is_dir() else beside).glob("*.py"))}


def find(config: str) -> str:
    """`path:variant` of what --config says: a file, else `name` or `configs/name.py` of this project."""
    path, colon, variant = config.partition(":")
    if path and Path(path).exists() and not Path(path).is_dir():
        check_regular(path)
        return config
    configs = own()
    name = Path(path).stem if Path(path) == Path("configs", f"{Path(path).stem}.py") else path
    if name not in configs:
        raise InputError(f"no config file at {path}, and none of that name; known by name: {', '.join(configs)}")
    return f"{configs[name]}{colon}{variant}"
