-- levels(sae, level): what each level of a Matryoshka dictionary adds and explains; any other SAE has a single level.
CREATE TABLE levels AS
SELECT *
FROM read_parquet($levels)
ORDER BY sae, level;
