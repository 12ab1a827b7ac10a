-- probes(sae, class, probe, k): how well a class is told from the rest on held-out images, by k latents or by the activations themselves.
CREATE TABLE probes AS
SELECT *
FROM read_parquet($probes)
ORDER BY sae, class, probe, k;
