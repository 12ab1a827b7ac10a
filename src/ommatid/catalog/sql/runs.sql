-- runs(sae): where an SAE comes from, its headline numbers, and what was decided about it; a published catalogue has a row for each SAE decided on.
CREATE TABLE runs AS
SELECT
    $sae::VARCHAR AS sae,
    $created_at::TIMESTAMP AS created_at,
    $model::VARCHAR AS model,
    $hookpoint::VARCHAR AS hookpoint,
    $git_commit::VARCHAR AS git_commit,
    $git_dirty::BOOLEAN AS git_dirty,
    $dvc_experiment::VARCHAR AS dvc_experiment,
    $dvc_lock::VARCHAR AS dvc_lock,
    $mlflow_run_id::VARCHAR AS mlflow_run_id,
    $prefect_flow_run_id::VARCHAR AS prefect_flow_run_id,
    $images_digest::VARCHAR AS images_digest,
    $activations_digest::VARCHAR AS activations_digest,
    $sae_digest::VARCHAR AS sae_digest,
    $params::JSON AS params,
    headline.fvu,
    headline.l0,
    headline.dead,
    headline.ms,
    headline.ms_floor,
    headline.judge,
    (SELECT count(*) FROM latents WHERE latents.sae = $sae::VARCHAR)::INTEGER AS n_latents,
    (SELECT count(*) FROM features WHERE features.sae = $sae::VARCHAR AND features.label IS NOT NULL)::INTEGER AS n_labelled,
    NULL::VARCHAR AS decision,
    NULL::TIMESTAMP AS decided_at,
    NULL::VARCHAR AS reason
FROM (SELECT 1)
LEFT JOIN (SELECT * FROM comparisons WHERE dictionary = 'sae' AND sae = $sae::VARCHAR) AS headline ON true;

COMMENT ON COLUMN runs.created_at IS 'when its catalogue was built, UTC';
COMMENT ON COLUMN runs.model IS 'the model that is explained';
COMMENT ON COLUMN runs.hookpoint IS 'where the activations were captured';
COMMENT ON COLUMN runs.git_commit IS 'commit of the code that trained it; null: no git';
COMMENT ON COLUMN runs.git_dirty IS 'whether tracked files differed from that commit; null: no git';
COMMENT ON COLUMN runs.dvc_experiment IS 'DVC experiment; null: made in the checkout, or no DVC';
COMMENT ON COLUMN runs.dvc_lock IS 'checksum of dvc.lock; null: no DVC';
COMMENT ON COLUMN runs.mlflow_run_id IS 'MLflow run that holds its curves; null: no tracking server answered';
COMMENT ON COLUMN runs.prefect_flow_run_id IS 'Prefect flow run that made it; null: made without Prefect';
COMMENT ON COLUMN runs.images_digest IS 'sha256 of the manifest of the images';
COMMENT ON COLUMN runs.activations_digest IS 'sha256 of the manifest of the activations it was trained on';
COMMENT ON COLUMN runs.sae_digest IS 'sha256 of the manifest of the SAE';
COMMENT ON COLUMN runs.params IS 'the params of each stage that led here, by section';
COMMENT ON COLUMN runs.n_latents IS 'latents of the SAE';
COMMENT ON COLUMN runs.n_labelled IS 'latents with a label';
COMMENT ON COLUMN runs.decision IS 'champion or challenger, by the retrain flow; null: it was not asked';
COMMENT ON COLUMN runs.decided_at IS 'when that was decided, UTC; null: it was not';
COMMENT ON COLUMN runs.reason IS 'the numbers behind the decision; null: none was made';
