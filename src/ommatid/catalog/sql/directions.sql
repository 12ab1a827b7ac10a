-- directions(sae, latent): the direction of a latent, by which it is found again in another SAE of the same activations.
CREATE TABLE directions AS
SELECT *
FROM read_parquet($directions)
ORDER BY sae, latent;
