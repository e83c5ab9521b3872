"""Every field of a config: python -m configs [FAMILY] [--markdown] [--search WORD]"""

from collections.abc import Sequence
import sys

from configs import arguments, base, families, page


def main(words: Sequence[str] | None = None) -> int:
  """Print the fields; return 0."""
  parser = arguments.Parser(prog="python -m configs", description=__doc__)
  parser.add_argument("family", nargs="?", default="resnet", help="model family (default resnet)")
  parser.add_argument("--markdown", action="store_true", help="the tables of configs/fields.md")
  parser.add_argument("--search", default="", metavar="WORD", help="only fields with this word")
  args = parser.parse_args(words)
  if args.markdown:
    print(page.markdown())
    return 0
  try:
    fields = base.all_fields(args.family)
  except ValueError as error:
    parser.error(f"{error} (families: {', '.join(families.FAMILIES)})")
  print(page.text(fields, search=args.search) or f"no field has {args.search!r}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
