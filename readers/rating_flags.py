"""The flags that say how a table of ratings is read. No package is imported here: verify_setup.py works without any."""

FLAGS = {
    "image_column": {"help": "column that names the picture (default: image, filename, file, stimulus or path)"},
    "target_columns": {
        "nargs": "+", "metavar": "NAME",
        "help": "ratings (default: all *_mean, else all numeric columns)"},
    "rater_column": {
        "help": "who rated, where a row holds one person's ratings of a picture (default: found by its name)"},
    "attribute_column": {
        "help": "what was asked, where a row is a single rating (default: found by its name, or "
                "the text that varies within a picture beside one column of numbers)"},
    "rating_column": {"help": "the answers, where a row is a single rating (default: found by its "
                              "name, or the only column of numbers)"},
    "missing_codes": {
        "type": float, "nargs": "*", "metavar": "CODE",
        "help": "numbers that stand for a missing rating, such as -99 999; none after the flag: all are ratings "
                "(default: stop where one of the usual codes lies far from all other values)"},
    "duplicates": {
        "choices": ("error", "mean", "ratings"), "default": "error",
        "help": "several rows of one picture that no column tells apart: error = stop; mean = "
                "average them; ratings = each is a single rating"},
}


def add_arguments(add):
    """Declare these flags; add: add_argument of a parser or of a group."""
    for name, options in FLAGS.items():
        add(f"--{name}", **options)


def values_of(args):
    """{flag: value}, as rating_tables.read_ratings takes them."""
    return {name: getattr(args, name) for name in FLAGS}
