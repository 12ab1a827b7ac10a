-- mistakes(sae, latent, labeller, kind, rank): a held-out image that a label gets wrong in the test that gives labels.score.
CREATE TABLE mistakes AS
SELECT *
FROM read_parquet($mistakes)
ORDER BY sae, latent, labeller, kind, rank;
