-- stability(sae, other_sae): how many directions of an SAE are also found in another SAE that decodes the same hookpoint.
CREATE TABLE stability AS
SELECT *
FROM read_parquet($stability)
-- SAEs that a later stage rejected are left out
WHERE sae IN (SELECT sae FROM read_parquet($runs)) AND other_sae IN (SELECT sae FROM read_parquet($runs))
ORDER BY sae, other_sae;
