-- neighbours(sae, latent, rank): the latents whose directions are nearest to a latent's by cosine.
CREATE TABLE neighbours AS
SELECT *
FROM read_parquet($neighbours)
ORDER BY sae, latent, rank;
