//! What is shown while an operation runs: steps as lines, progress as bars on a terminal.

use crate::cli::out::{Out, plain};
use crate::control::Event;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;

/// Bars at a time; an agent that names more things than this shows the first of them.
const BARS_MAX: usize = 32;

/// Follows the events of one operation.
pub(super) struct Follow<'a> {
    out: &'a mut Out,
    quiet: bool,
    bars: Option<MultiProgress>,
    by_name: BTreeMap<String, ProgressBar>,
    /// Whether any step was shown.
    pub stepped: bool,
}

impl<'a> Follow<'a> {
    /// `quiet` shows nothing at all (for `--json`).
    pub(super) fn new(out: &'a mut Out, quiet: bool) -> Self {
        let seen = !quiet && std::io::stderr().is_terminal();
        let bars = seen.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Follow { out, quiet, bars, by_name: BTreeMap::new(), stepped: false }
    }
    /// Shows one event; the last ones are somebody else's.
    pub(super) fn event(&mut self, event: &Event) {
        match event {
            Event::Step { name, outcome, detail, ms } if !self.quiet => {
                self.stepped = true;
                let line = step_line(name, outcome, detail, *ms);
                match &self.bars {
                    Some(bars) => bars.suspend(|| self.out.say(&line)),
                    None => self.out.say(&line),
                }
            }
            Event::Progress { what, done, total, unit } => self.progress(what, *done, *total, unit),
            _ => {}
        }
    }
    fn progress(&mut self, what: &str, done: u64, total: u64, unit: &str) {
        let Some(bars) = &self.bars else { return };
        if !self.by_name.contains_key(what) {
            if self.by_name.len() >= BARS_MAX {
                return;
            }
            self.by_name.insert(what.to_string(), bars.add(ProgressBar::new(total).with_message(plain(what))));
        }
        let bar = &self.by_name[what];
        if bar.length() != Some(total) || bar.position() == 0 {
            bar.set_length(total);
            bar.set_style(style(total, unit));
        }
        bar.set_position(done);
    }
}

impl Drop for Follow<'_> {
    fn drop(&mut self) {
        self.by_name.values().for_each(ProgressBar::finish_and_clear);
    }
}

/// The look of a bar; without a known total there is nothing to fill.
fn template(total: u64, unit: &str) -> &'static str {
    match (unit, total) {
        ("bytes", 0) => "  {msg:24} {binary_bytes} {binary_bytes_per_sec}",
        ("bytes", _) => "  {msg:24} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        (_, 0) => "  {msg:24} {human_pos} {per_sec}",
        (_, _) => "  {msg:24} [{bar:30}] {human_pos}/{human_len} {eta}",
    }
}

fn style(total: u64, unit: &str) -> ProgressStyle {
    let known = ProgressStyle::with_template(template(total, unit));
    known.map_or_else(|_| ProgressStyle::default_bar(), |s| s.progress_chars("=> "))
}

/// `  ok  attach pgdata            changed   12 ms`.
pub(super) fn step_line(name: &str, outcome: &str, detail: &str, ms: u64) -> String {
    let mark = match outcome {
        "failed" => "FAIL",
        "would change" => "plan",
        _ => "ok",
    };
    let line = format!("  {mark:<4} {:<32} {:<12} {ms:>6} ms  {}", plain(name), plain(outcome), plain(detail));
    format!("{}\n", line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_one_line_whatever_its_words() {
        assert_eq!(
            step_line("attach pgdata", "changed", "", 12),
            "  ok   attach pgdata                    changed          12 ms\n"
        );
        let nasty = step_line("a\nb", "failed", "x\u{1b}[31m\ny", u64::MAX);
        assert!(nasty.starts_with("  FAIL a") && nasty.lines().count() == 1 && !nasty.contains('\u{1b}'), "{nasty:?}");
    }

    #[test]
    fn every_look_of_a_bar_is_a_template_that_parses() {
        for unit in ["bytes", "blocks"] {
            for total in [0, 7] {
                ProgressStyle::with_template(template(total, unit)).unwrap();
            }
        }
    }
}
