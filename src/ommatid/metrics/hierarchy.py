"""Where in a taxonomy a latent is at home."""

from collections.abc import Sequence


def lca_depth(paths: Sequence[Sequence[str]]) -> int:
    """Depth of the lowest common ancestor of classes: how many names their paths from the root have in common; 0 is the root.

    The deeper, the more special what they share: (animal, mammal, dog) and (animal, mammal, cat) give 2.
    """
    depth = 0
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        depth += 1
    return depth
