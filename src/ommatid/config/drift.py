"""Section `drift`."""

from typing import Annotated, Literal

from pydantic import Field

from ommatid.config.section import Section


class DriftParams(Section):
    """How new images are compared with the champion's before training, and what happens if they differ."""

    alpha: Annotated[float, Field(ge=0.01, le=0.2)] = 0.05
    """Largest probability of finding drift where there is none, over all tests of a check together."""
    max_auroc: Annotated[float, Field(ge=0.5, le=1)] = 0.55
    """Largest AUROC with which a classifier may tell new images from the champion's, if it is above chance; 0.5 is chance."""
    max_fvu_rise: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Largest amount by which the FVU of the champion's SAE may be higher on new images than on its own evaluation images, if it is above
    chance."""
    max_changed: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of latents that may have changed: those that fire on more or fewer of the new images, or more or less strongly."""
    min_images: Annotated[int, Field(ge=16)] = 100
    """Number of new images below which nothing is concluded; they are compared together with those that come in later."""
    action: Literal["warn", "stop"] = "warn"
    """What a retraining does about drift: `warn` says so and trains on the new images, `stop` ends the run before training."""
