"""Controls of an edit of latents, by the names of their arms in `schemas.ARMS`; here, as the explorer's server holds no pyarrow."""

RANDOM_ARMS = ("random_latent", "random_direction")
"""Controls that are drawn several times."""
EXCEEDED_ARMS = ("sign_flipped", *RANDOM_ARMS)
"""Controls that an edit must exceed. `diff_means` is another way to the same end and not a control of it, and `untouched` changes what the
edit, which keeps the SAE's error, does not."""
N_DRAWS = 8
"""Number of draws of each random control, from which its interval is made, unless another one is asked for."""
