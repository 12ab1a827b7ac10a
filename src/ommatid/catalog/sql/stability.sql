-- stability(sae, other_sae): how many of an SAE's directions another SAE of the same activations has, too.
CREATE TABLE stability AS
SELECT *
FROM read_parquet($stability)
-- a stage may have rejected an SAE after it was matched
WHERE sae IN (SELECT sae FROM read_parquet($runs)) AND other_sae IN (SELECT sae FROM read_parquet($runs))
ORDER BY sae, other_sae;
