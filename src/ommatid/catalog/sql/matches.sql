-- matches(sae, latent, other_sae): the latent of another SAE of the same activations whose direction is nearest to a latent's.
CREATE TABLE matches AS
SELECT *
FROM read_parquet($matches)
ORDER BY sae, other_sae, latent;
