-- neighbours(sae, latent, rank): the latents of the same SAE whose directions are nearest to that of a latent, by cosine.
CREATE TABLE neighbours AS
SELECT *
FROM read_parquet($neighbours)
ORDER BY sae, latent, rank;
