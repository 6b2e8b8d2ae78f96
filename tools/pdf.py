"""Print pages of the built site with Chromium, one PDF each.

python -m tools.pdf build/site/notebooks/*.html --to build/pdf
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NUMBERS = """
<div style="font-size: 8px; width: 100%; text-align: center">
  <span class="pageNumber"></span> / <span class="totalPages"></span>
</div>
"""


def print_pages(pages: Sequence[Path], folder: Path) -> list[Path]:
    """Print each page to a PDF in `folder`, and return the PDFs. Raises RuntimeError without Chromium."""
    if CHROMIUM is None:
        raise RuntimeError("printing needs Chromium (Debian, Ubuntu: apt install chromium)")
    printed = [folder / f"{page.stem}.pdf" for page in pages]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        sheet = browser.new_page(color_scheme="light")
        for page, target in zip(pages, printed, strict=True):
            sheet.goto(page.resolve().as_uri())
            sheet.pdf(
                path=target,
                format="A4",
                margin={"top": "15mm", "bottom": "15mm", "left": "15mm", "right": "15mm"},
                print_background=True,
                tagged=True,
                display_header_footer=True,
                header_template="<span></span>",
                footer_template=NUMBERS,
            )
        browser.close()
    return printed


def main(arguments: list[str]) -> int:
    """Print the pages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--to", dest="folder", type=Path, default=Path("build/pdf"))
    options = parser.parse_args(arguments)
    print(*print_pages(options.pages, options.folder), sep="\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RuntimeError as error:
        sys.exit(str(error))
