-- interventions(sae, latent, outcome, arm, dose): what the model's output does while a latent is set to an activation, or under a control.
-- If the model could not be run again, the SAE has no rows, and summary.reason in the manifest of its interventions says why.
CREATE TABLE interventions AS
SELECT *
FROM read_parquet($interventions)
ORDER BY sae, latent, outcome, arm, dose;
