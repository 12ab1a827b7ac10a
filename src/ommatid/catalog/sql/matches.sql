-- matches(sae, latent, other_sae): the latent of another SAE that decodes the same hookpoint whose direction is nearest to that of
-- a latent.
CREATE TABLE matches AS
SELECT *
FROM read_parquet($matches)
-- matches of SAEs that a later stage rejected are left out
WHERE sae IN (SELECT sae FROM read_parquet($runs)) AND other_sae IN (SELECT sae FROM read_parquet($runs))
ORDER BY sae, other_sae, latent;
