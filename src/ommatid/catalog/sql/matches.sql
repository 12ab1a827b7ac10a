-- matches(sae, latent, other_sae): the latent of another SAE of the same activations whose direction is nearest to a latent's.
CREATE TABLE matches AS
SELECT *
FROM read_parquet($matches)
-- a stage may have rejected an SAE after it was matched
WHERE sae IN (SELECT sae FROM read_parquet($runs)) AND other_sae IN (SELECT sae FROM read_parquet($runs))
ORDER BY sae, other_sae, latent;
