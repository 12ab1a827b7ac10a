-- cofiring(sae, latent, rank): the 8 latents that most often fire on the same images as a latent, relative to chance (lift).
-- Only pairs that fire together on at least 8 images are listed, as the lift of rarer pairs is not reliable.
CREATE TABLE cofiring AS
SELECT *
FROM read_parquet($cofiring)
ORDER BY sae, latent, rank;
