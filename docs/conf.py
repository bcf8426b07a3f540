"""Sphinx configuration. Neither the build nor the pages need the network."""

from importlib.metadata import version as installed_version

project = "linearize"
author = "the linearize developers"
copyright = "2026, the linearize developers"
release = version = installed_version("linearize")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# Single backquotes in docstrings mean code.
default_role = "code"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = True
autodoc_member_order = "bysource"
# Types stand in the annotations, once; the reference shows them beside the parameters.
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Array": "numpy.ndarray"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

# Links into the package must lead somewhere; names of other packages are not resolved.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!linearize\.).*"),
    (r"py:.*", r"linearize\._.*"),
    (r"py:class", r".*\.[A-Z]"),  # variables that stand for types
]

html_theme = "furo"
html_title = f"linearize {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
