-- cofiring(sae, latent, rank): the latents that fire on the same images more often than chance, the 8 of highest lift.
-- Only pairs that fire together on at least 8 images: of fewer the lift is not known.
CREATE TABLE cofiring AS
SELECT *
FROM read_parquet($cofiring)
ORDER BY sae, latent, rank;
