"""Sphinx builds the site of these pages: ``nox -s site``, into build/site. GitHub shows the same files."""

import functools
import importlib.util
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
META = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = META["name"]
version = release = META["version"]
project_copyright = "the fusedrnn authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
nitpicky = True
# No other project's documentation is read at build time: only our own names are checked.
nitpick_ignore_regex = [("py:.*", r"(?!fusedrnn\b).*")]

myst_heading_anchors = 4  # as GitHub names them

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and dtypes
autodoc_inherit_docstrings = False  # PyTorch's are in PyTorch's documentation
autodoc_preserve_defaults = True

highlight_language = "none"  # of blocks that name no language

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"{project} {version}"
html_show_sourcelink = html_copy_source = False

linkcheck_timeout = 20
linkcheck_retries = 2

# Pages of the site that are files of the top folder. What docs/ has under these names is for GitHub.
TOP = {"contributing": ROOT / "CONTRIBUTING.md", "changelog": ROOT / "CHANGELOG.md"}
LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def fit_links(app, docname, source):
    """Links to files that are on no page of the site, which GitHub follows, become the files' names."""
    page = TOP.get(docname, Path(app.srcdir, docname))
    if docname in TOP:
        app.env.note_dependency(page)
        source[0] = page.read_text()

    def fitted(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        path = (page.parent / target).resolve()
        if path.is_relative_to(app.srcdir):
            return f"[{text}](/{path.relative_to(app.srcdir)}{anchor})"
        name = str(path.relative_to(ROOT))
        return f"`{name}`" if name.endswith(text.strip("`")) else f"{text} (`{name}`)"

    source[0] = LINK.sub(fitted, source[0])


def leave_out_torch(app, docname, source):
    """Without PyTorch nobody can import what this page shows."""
    if docname == "reference/torch" and not importlib.util.find_spec("torch"):
        source[0] = re.sub(
            r"(?s)```\{eval-rst\}.*?```", "*This needs PyTorch when the site is built.*", source[0]
        )


# Names without an underscore that only other modules of the package use, and those that PyTorch calls.
INTERNAL = """
assign_weights check_sizes dtype_of from_dezero_layout take_sizes weight_shapes weights_of
backward_nodes digest forward_nodes fused gradient is_builtin saved trace
as_operand gradients kind like require_gpu sum_to
extra_repr mode serve torch_class
"""


def skip(app, what, name, obj, skip, options):
    """Internal names, what is derived from a cell, and fields that a NamedTuple's docstring explains."""
    field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    derived = isinstance(obj, functools.cached_property) and name in ("forward", "backward")
    return True if field or derived or name in INTERNAL.split() else None


def setup(app):
    app.connect("source-read", fit_links)
    app.connect("source-read", leave_out_torch)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
