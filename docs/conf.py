"""Settings of the documentation: `make docs` builds it with warnings as errors and without a network."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

import sphinx_autosummary_accessors

import dask_semdedup  # noqa: F401  (registers ddf.semdedup, which autodoc then finds on dask.dataframe.DataFrame)

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# So that program-output finds the command of this environment, and its help is as wide as a page.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ["COLUMNS"] = "90"

project = "dask-semdedup"
author = "dask-semdedup developers"
project_copyright = author
version = release = installed_version("dask-semdedup")

extensions = [
    "mathml",  # docs/_ext: formulas without JavaScript
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_autosummary_accessors",
    "sphinx_copybutton",
    "sphinxcontrib.programoutput",
]
exclude_patterns = ["_build", "_ext", "_templates"]
templates_path = ["_templates", sphinx_autosummary_accessors.templates_path]

# Pages and notebooks. Notebooks are shown as they are kept; a test runs them.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
html_math_renderer = "mathml"

# The API. Types are in the docstrings, so that signatures stay short.
autosummary_generate = True
autodoc_typehints = "none"
add_module_names = False
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
default_role = "literal"
# Base classes of the exceptions, documented by Python and not here.
nitpick_ignore_regex = [
    ("py:class", r"(Exception|FileExistsError|FileNotFoundError|ImportError|KeyError|OSError|UserWarning|ValueError)")
]

html_theme = "furo"
html_title = "dask-semdedup"
# The blue of the package's figures, and a lighter one to read on dark ground.
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
html_static_path = ["_static"]
html_css_files = ["semdedup.css"]
html_show_sphinx = False
html_copy_source = False
smartquotes = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_exclude = ".linenos, .gp, .go"
