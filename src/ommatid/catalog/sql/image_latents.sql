-- image_latents(sae, image, rank): the 32 latents that fire most strongly on an image. Query firings for all latents of one image; that
-- takes longer, as firings are stored by latent.
CREATE TABLE image_latents AS
SELECT
    sae,
    image,
    (row_number() OVER strongest)::INTEGER AS rank,
    latent,
    act
FROM firings
WINDOW strongest AS (PARTITION BY sae, image ORDER BY act DESC, latent)
QUALIFY row_number() OVER strongest <= 32
ORDER BY sae, image, rank;
