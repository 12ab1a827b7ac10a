-- examples(sae, latent, decile, rank): an example image on which a latent fires, from every decile of its activations, not only the top.
CREATE TABLE examples AS
SELECT *
FROM read_parquet($examples)
ORDER BY sae, latent, decile DESC, rank;
