-- levels(sae, level): what each level of a Matryoshka dictionary adds and explains; another SAE is one level.
CREATE TABLE levels AS
SELECT *
FROM read_parquet($levels)
ORDER BY sae, level;
