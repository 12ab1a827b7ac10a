-- densities(sae, dictionary, low): number of latents that fire on a share of the tokens between low and high, by order of magnitude;
-- low 0: latents that never fire.
CREATE TABLE densities AS
SELECT *
FROM read_parquet($densities)
ORDER BY sae, dictionary, low;
