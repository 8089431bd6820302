"""Write the tables that README.md and the pages under model_cards quote anew, from the results that they name.

python scripts/quote_tables.py           # rewrites the pages
python scripts/quote_tables.py --check   # exit code 1 if a page would change

A quoted table stands below `<!-- table: PATH N -->`: table N, counted from 0, of the `tables.md` at PATH.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUOTE = re.compile(r"<!-- table: (\S+) (\d+) -->\n\n(?:\|.*\n)*\n*")


def pages() -> list[Path]:
    """README.md and every page that is written by hand; model cards are generated with their tables in them."""
    folders = ("", "faults/", "frontier/", "memory/", "notes/", "support/", "theory/", "versions/")
    return [
        ROOT / "README.md",
        *(path for folder in folders for path in sorted(ROOT.glob(f"model_cards/{folder}*.md"))),
    ]


def tables(path: str) -> list[str]:
    """The tables of a `tables.md`, without blank lines around them."""
    return [table.strip() for table in (ROOT / path).read_text(encoding="utf-8").strip().split("\n\n")]


def with_tables(text: str) -> str:
    """A page with every quoted table as the results have it, and an empty line after it, which ends a table."""
    quoted = QUOTE.sub(
        lambda quote: f"<!-- table: {quote[1]} {quote[2]} -->\n\n{tables(quote[1])[int(quote[2])]}\n\n", text
    )
    return quoted.rstrip() + "\n"


def main() -> None:
    """Rewrite the pages, or check them."""
    changed = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            changed.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    print("\n".join(changed) or "every quoted table is that of the results")
    sys.exit(bool(changed) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
