-- examples(sae, latent, decile, rank): an image on which a latent fires, kept to be looked at; all deciles, not only the top.
CREATE TABLE examples AS
SELECT *
FROM read_parquet($examples)
ORDER BY sae, latent, decile DESC, rank;
