"""The documentation site. Built by `python -m sphinx -W -n -b html docs docs/_build/html`; needs no network.

What can be read off the program is read off it while the site is built (`_ext`): commands and options, tables, losses,
recipes, layouts, public functions. So those pages cannot fall behind; what they say is tested in `tests`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

from freqkd_analysis import __version__  # noqa: E402

project = "freqkd"
author = "The freqkd contributors"
project_copyright = "the freqkd contributors, Apache License 2.0"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "generated", "api_pages",
              "notebook_pages"]  # fmt: skip
exclude_patterns = ["_build", "_ext", "**/.ipynb_checkpoints"]

myst_heading_anchors = 3
smartquotes = False  # two hyphens must stay two: options are named in running text
# Commands in the pages are run by the tests, not while the site is built: a build must not take minutes.
nb_execution_mode = "off"

autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

# Names of other projects cannot be looked up without a network; type variables and names that exist for type checkers
# alone have no entry of their own.
nitpick_ignore_regex = [(r"py:.*", r"(?!freqkd_(analysis|train)\.).*"), (r"py:class", r"freqkd_.*\.[A-Z]")]

html_theme = "furo"
html_title = f"freqkd {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
