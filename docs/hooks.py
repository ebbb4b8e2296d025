"""What the site has beside docs/*.md: README, CONTRIBUTING and CHANGELOG as pages, and the reference from docstrings.

Nothing is written twice: a page is made from the file as it stands, with its links changed to where the site has them.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
REFERENCE = {
    "models": ("Models and the rule", ["visibility", "models.hf", "models.model_folder", "models.transformer"]),
    "decoding": (
        "Decoders",
        [f"decoding.{name}" for name in ("cdlm", "naive", "dream", "fast_dllm", "dllm_cache", "autoregressive")]
        + ["decoding.progress", "decoding.unmask", "decoding.options"],
    ),
    "training": ("Training", [f"training.{name}" for name in ("losses", "step", "distill", "denoising", "optimizer")]),
    "evaluation": (
        "Trajectories and evaluation",
        ["trajectories.collect", "trajectories.states", "evaluation.harness", "evaluation.metrics", "tasks.base"],
    ),
    "kernels": ("Kernels", ["kernels.block_attention.api", "kernels.vocab.api"]),
    "recipes": ("Recipes", ["recipes.recipe"]),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=as_pages((ROOT / source).read_text())))
    for name, (title, modules) in REFERENCE.items():
        content = "\n\n".join([f"# {title}", *(f"::: cdlm_jax.{module}" for module in modules)])
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    return as_pages(markdown)


def as_pages(text: str) -> str:
    """Links between files of the repository, as links between pages; one to a file without a page becomes its name."""

    def link(match: re.Match[str]) -> str:
        name, path, anchor = match.groups(default="")
        page = path.removeprefix("../").removeprefix("docs/")
        page = PAGES.get(page, page)
        known = page in PAGES.values() or (ROOT / "docs" / page).is_file()
        if known:
            return f"[{name}]({page}{anchor})"
        return name if (ROOT / path.removeprefix("../")).exists() else match[0]  # what is nowhere stays, and fails

    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", link, text)
