"""A path in a taxonomy: classes from the root to the image's own, separated by /, such as animal/mammal/dog."""


def normalise(path: str | None) -> str | None:
    """The path without blanks around its classes and without a slash at either end; None where nothing is left.

    Paths may be of different lengths, and images may have none. A class without a name between two others is refused: levels
    are compared by their place, and whether two such classes are the same nobody can tell.

    Raises:
        ValueError: a class in the middle has no name.
    """
    if not path or not (trimmed := path.strip().strip("/").strip()):
        return None
    classes = [name.strip() for name in trimmed.split("/")]
    if not all(classes):
        raise ValueError(f"the taxonomy {path!r} has a class without a name between two slashes; name it, or leave the whole path empty")
    return "/".join(classes)
