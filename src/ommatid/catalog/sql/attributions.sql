-- attributions(sae, output, rank): the latents to which an output of the model owes most, estimated from gradients for all latents at once.
CREATE TABLE attributions AS
SELECT *
FROM read_parquet($attributions)
ORDER BY sae, output, rank;
