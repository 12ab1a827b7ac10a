-- latents(sae, latent): statistics of a latent on the evaluation split.
CREATE TABLE latents AS
SELECT *
FROM read_parquet($latents)
ORDER BY sae, latent;
