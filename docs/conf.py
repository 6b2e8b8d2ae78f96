"""The site: `make site` builds it from the notebooks as they are stored and from the pages in this folder.

Sphinx's source folder is the project's, so that links between notebooks, pages and files work here as on disk.
"""

import os
import sys
from pathlib import Path

from sphinx.errors import ConfigError

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

project = "The reference-model kit"
html_title = project
author = "the authors of refkl-lib"
copyright = "the authors of refkl-lib, Apache-2.0"
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "tools.site"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "build", "refkl_lib", "tests", "tools", "benchmarks"]

nb_execution_mode = "off"  # what is shown is what `make notebooks` stored and the tests check
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_heading_slug_func = "tools.site.anchor"

autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
add_module_names = False
default_role = "code"  # docstrings write names as Markdown does

html_theme = "sphinx_book_theme"
html_theme_options = {
    "navbar_persistent": [],  # the search is in the sidebar
    "search_as_you_type": True,
    "use_fullscreen_button": False,
    "article_header_end": ["language.html", "article-header-buttons.html"],
}
# Where a reader can run a page, with a kernel and live panels: `REFKL_REPOSITORY=https://github.com/… make site`, and
# REFKL_HUB for a room's JupyterHub. Without them there are no such buttons, and nothing on a page leads elsewhere.
hub = os.environ.get("REFKL_HUB", "")
if repository := os.environ.get("REFKL_REPOSITORY"):
    on_github = repository.startswith("https://github.com/")  # Colab opens notebooks from there alone
    html_theme_options |= {
        "repository_url": repository,
        # Of a host that the theme does not know, it wants to be told whose addresses it copies.
        "repository_provider": "gitlab" if "gitlab" in repository else "github",
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com" if on_github else "",
            "jupyterhub_url": hub,
        },
    }
elif hub:
    raise ConfigError(f"REFKL_HUB is {hub}, and the hub has to be told what to fetch: set REFKL_REPOSITORY as well")
templates_path = [str(DOCS / "templates")]
html_context = {"default_mode": "auto"}
html_static_path = [str(DOCS / "static")]
html_css_files = ["kit.css"]
html_extra_path = [str(DOCS / "landing")]
html_use_index = False  # the library's page lists its names
html_domain_indices = False
smartquotes = False

# A translation is a folder of catalogues, one a page. A page without one stays in English.
locale_dirs = [str(DOCS / "locale")]
gettext_compact = False
gettext_location = False  # else a catalogue would change with every line that is added to a page
