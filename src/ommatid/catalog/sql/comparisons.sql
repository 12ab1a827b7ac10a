-- comparisons(sae, dictionary): an SAE compared with its baselines, such as an untrained SAE and the raw neurons, on the same evaluation split.
CREATE TABLE comparisons AS
SELECT *
FROM read_parquet($comparisons)
ORDER BY sae, dictionary;
