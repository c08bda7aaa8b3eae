"""How Sphinx builds these pages: ``make docs``. Why Sphinx: see CONTRIBUTING.md."""

import os

os.environ["MPI4PY_RC_INITIALIZE"] = "no"  # the reference is read from docstrings, without ranks

project = "hvd_compress"
copyright = "hvd_compress contributors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
add_module_names = False

pygments_style = "tango"  # in which the lines of a diff have colours
html_theme = "furo"
html_title = "hvd_compress"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_show_sourcelink = False
