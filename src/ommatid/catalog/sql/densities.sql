-- densities(sae, dictionary, low): how many latents fire on a share of the tokens from low to high, by order of magnitude; low 0: never.
CREATE TABLE densities AS
SELECT *
FROM read_parquet($densities)
ORDER BY sae, dictionary, low;
