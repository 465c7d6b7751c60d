//! scaffold

use crate::config::Settings;
use crate::model::{Exit, Res};

/// Runs the agent until SIGTERM or SIGINT; calls `ready` once its control socket listens.
pub fn run(_settings: Settings, _ready: &dyn Fn()) -> Res<()> {
    todo!()
}

/// What this host can and cannot do, without a running agent.
pub fn doctor(_settings: &Settings) -> Res<(serde_json::Value, Exit)> {
    todo!()
}
