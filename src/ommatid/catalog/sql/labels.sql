-- labels(sae, latent, labeller): the label that a labeller gave to a latent; if there is none, status gives the reason.
CREATE TABLE labels AS
SELECT *
FROM read_parquet($labels)
ORDER BY sae, latent, place, labeller;
