-- latents(sae, latent): what a latent does on the evaluation split.
CREATE TABLE latents AS
SELECT *
FROM read_parquet($latents)
ORDER BY sae, latent;
