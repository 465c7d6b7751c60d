//! The words that people type. What they mean is decided elsewhere; what they look like is decided here.

use crate::model::FileSystem;
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Where the configuration is when nobody says otherwise.
pub(super) const CONFIG_DEFAULT: &str = "/etc/doublure/doublure.toml";

/// The understudy of your Docker volumes: replicates them block by block to a standby host, and goes on when it must.
#[derive(Debug, Parser)]
#[command(name = "doublure", version, subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "Example, once an agent runs on both hosts:
  standby#  doublure pair                                 # shows a code
  primary#  doublure pair 10.0.0.2:7400                   # asks for it
  primary#  doublure volume create pgdata --size 2G
  primary#  docker run -d --name db -v pgdata:/var/lib/postgresql/data postgres:17
  primary#  doublure protect shop --container db
  primary#  doublure status --watch
  standby#  doublure failover shop                        # the day it is needed

Exit codes: 0 done or already so, 1 failed, 2 usage or configuration, 3 refused as unsafe,
4 done but degraded, 5 another operation holds the group, 6 no agent.")]
pub(super) struct Args {
    /// The configuration of this host [default: /etc/doublure/doublure.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Answers with one line of JSON; an error is {"error":{"code","thing","cause","next"}}
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Runs the agent of this host until it is told to stop (SIGTERM, Ctrl-C)
    #[command(after_help = "Example:
  doublure agent --config /etc/doublure/doublure.toml")]
    Agent,
    /// Says what this host can and cannot do, and what would cure it; works without an agent
    #[command(after_help = "Example:
  doublure doctor
  doublure doctor --json | jq .")]
    Doctor,
    /// Pairs two hosts: opens a window here, or uses the window that is open at ADDRESS:PORT
    ///
    /// Without an address it opens a window and prints a code. With one it reads that code from standard input (asked for
    /// without echo on a terminal) and pins the keys of both hosts.
    #[command(after_help = "Example:
  standby#  doublure pair
  primary#  doublure pair 10.0.0.2:7400
  primary#  doublure pair 10.0.0.2:7400 < code.txt        # in a script")]
    Pair {
        /// Where the other host listens; its window must be open
        #[arg(value_name = "ADDRESS:PORT")]
        address: Option<String>,
    },
    /// Makes, lists and removes volumes
    #[command(subcommand_required = true, arg_required_else_help = true)]
    #[command(after_help = "Example:
  doublure volume create pgdata --size 2G
  doublure volume list")]
    Volume {
        #[command(subcommand)]
        verb: VolumeVerb,
    },
    /// Makes a group of containers and their volumes, and replicates it to a paired host
    #[command(after_help = "Example:
  doublure protect shop --container db --container web --peer beta
  doublure protect files --volume uploads")]
    Protect(Protect),
    /// Shows every group: role, how far it is recoverable, what lags and what is degraded
    #[command(after_help = "Example:
  doublure status
  doublure status --watch
  doublure status --json | jq '.groups[] | {name, recoverable_to, rpo_seconds}'")]
    Status {
        /// Shows it again every second until Ctrl-C; one line a group and second where there is no terminal
        #[arg(long)]
        watch: bool,
    },
    /// Asks for a cut of a group now
    #[command(after_help = "Example:
  doublure sync shop --wait && echo 'the standby has it'

Ctrl-C ends the waiting, not the sync.")]
    Sync {
        /// The group
        group: String,
        /// Waits until the standby has committed it
        #[arg(long)]
        wait: bool,
    },
    /// Makes this host serve a group: finishes its replica, mounts it, starts its containers
    #[command(after_help = "Example:
  doublure failover shop --dry-run       # says what it would do, changes nothing
  doublure failover shop
  doublure failover shop --force         # the old primary cannot be asked: make sure that it is off

It can be repeated: what is done already is reported as such. Ctrl-C ends the watching, not the failover.")]
    Failover {
        /// The group
        group: String,
        /// Prints the plan and changes nothing
        #[arg(long)]
        dry_run: bool,
        /// Goes on although the old primary could not be asked or still serves
        #[arg(long)]
        force: bool,
    },
    /// Compares both sides of a group block by block while it runs
    #[command(after_help = "Example:
  doublure verify shop || echo 'differs, see doublure status'")]
    Verify {
        /// The group
        group: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum VolumeVerb {
    /// Makes a volume: a loop file with a file system and a Docker volume of the same name on it
    #[command(after_help = "Example:
  doublure volume create pgdata --size 2G
  doublure volume create uploads --size 50G --fs xfs --mount-options noatime")]
    Create {
        /// Its name, in Docker too
        name: String,
        /// Its size: 2G, 512 MiB, 1048576
        #[arg(long)]
        size: String,
        /// Its file system
        #[arg(long, value_enum, default_value_t = Fs::Ext4)]
        fs: Fs,
        /// Mount options, as in mount -o
        #[arg(long, value_name = "OPTIONS", default_value = "")]
        mount_options: String,
    },
    /// Lists the volumes of this host
    #[command(after_help = "Example:
  doublure volume list")]
    List,
    /// Removes a volume that no group and no container uses, and its data
    #[command(after_help = "Example:
  doublure volume remove pgdata --confirm pgdata")]
    Remove {
        /// Its name
        name: String,
        /// The name once more: its data goes with it. Asked for on a terminal
        #[arg(long, value_name = "NAME")]
        confirm: Option<String>,
    },
}

#[derive(Debug, ClapArgs)]
pub(super) struct Protect {
    /// The group's name
    pub group: String,
    /// A container of the group, with all its volumes; may be repeated
    #[arg(long = "container", value_name = "CONTAINER", required_unless_present = "volumes")]
    pub containers: Vec<String>,
    /// A volume of the group, besides those of its containers; may be repeated
    #[arg(long = "volume", value_name = "VOLUME")]
    pub volumes: Vec<String>,
    /// The paired host that stands by; needed when more than one is paired
    #[arg(long, value_name = "HOST")]
    pub peer: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Fs {
    Ext4,
    Xfs,
}

impl From<Fs> for FileSystem {
    fn from(fs: Fs) -> FileSystem {
        match fs {
            Fs::Ext4 => FileSystem::Ext4,
            Fs::Xfs => FileSystem::Xfs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_words_fit_together() {
        Args::command().debug_assert();
    }
}
