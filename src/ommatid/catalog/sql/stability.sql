-- stability(sae, other_sae): how many of an SAE's directions another SAE of the same activations has, too.
CREATE TABLE stability AS
SELECT *
FROM read_parquet($stability)
ORDER BY sae, other_sae;
