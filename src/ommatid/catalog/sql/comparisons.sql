-- comparisons(sae, dictionary): the SAE beside an untrained one and the raw neurons, on the same evaluation split.
CREATE TABLE comparisons AS
SELECT *
FROM read_parquet($comparisons)
ORDER BY sae, dictionary;
