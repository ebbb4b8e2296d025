"""A hook of mkdocs: README, CONTRIBUTING and CHANGELOG are pages too, with their links as they are seen from docs."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FORGE = re.compile(r"\]\((?:\.\./)*((?:examples|launch|tests|configs|benchmarks|cdlm_jax)[^)]*)\)")


def on_files(files, config):
    """Add the pages that lie above docs/, and leave out this file."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, name in PAGES.items():
            text = text.replace(f"]({other})", f"]({name})")
        files.append(File.generated(config, page, content=text))
    files.remove(files.get_file_from_path("mkdocs_hooks.py"))
    return files


def on_page_markdown(markdown, page, config, files):
    """What is code and not a page is named, not linked."""
    return re.sub(r"\[([^\]]+)" + FORGE.pattern, r"`\2`", markdown)
