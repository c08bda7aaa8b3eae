"""How Sphinx builds these pages: ``make docs``. Why Sphinx: see CONTRIBUTING.md."""

import os

os.environ["MPI4PY_RC_INITIALIZE"] = "no"  # the reference is read from docstrings, without ranks

project = "hvd_compress"
copyright = "hvd_compress contributors, Apache-2.0"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_type_aliases = {"Case": "Case"}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False

exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "hvd_compress"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_show_sourcelink = False
