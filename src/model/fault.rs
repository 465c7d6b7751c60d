//! The one error of the house: a sentence that names the thing, the cause and the next step.

use serde::{Deserialize, Serialize};

/// What almost every door returns.
pub type Res<T> = Result<T, Fault>;

/// How a command ends; the numbers are the exit codes of the binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Exit {
    /// Done, or already so.
    Done = 0,
    /// Failed.
    Failed = 1,
    /// Usage or configuration.
    Usage = 2,
    /// Refused as unsafe.
    Refused = 3,
    /// Done, but something is degraded.
    Degraded = 4,
    /// Another operation holds the group.
    Busy = 5,
    /// No agent answers.
    NoAgent = 6,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $exit:ident;)*) => {
        /// Stable codes, one for each kind of fault. Never renamed once released.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Code { $($(#[$doc])* #[serde(rename = $text)] $name,)* }
        impl Code {
            /// The code as it is printed.
            pub fn as_str(self) -> &'static str { match self { $(Code::$name => $text,)* } }
            /// The exit code that a command failing with it ends with.
            pub fn exit(self) -> Exit { match self { $(Code::$name => Exit::$exit,)* } }
            /// Every code, for the catalogue.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];
        }
    };
}

codes! {
    /// Unknown key, wrong unit or a value out of range in the configuration.
    ConfigInvalid = "CONFIG_INVALID", Usage;
    /// A name, size or argument that cannot be used.
    BadArgument = "BAD_ARGUMENT", Usage;
    /// The command needs root.
    NotRoot = "NOT_ROOT", Usage;
    /// The agent's socket is not there or does not answer.
    NoAgent = "NO_AGENT", NoAgent;
    /// Another agent holds the state directory.
    StateDirHeld = "STATE_DIR_HELD", Busy;
    /// The state directory has the wrong owner, mode or kind.
    StateDirUnsafe = "STATE_DIR_UNSAFE", Refused;
    /// Another operation holds the group.
    GroupBusy = "GROUP_BUSY", Busy;
    /// No such group on this host.
    GroupUnknown = "GROUP_UNKNOWN", Usage;
    /// No such volume on this host.
    VolumeUnknown = "VOLUME_UNKNOWN", Usage;
    /// A volume, group or Docker volume of this name exists already and differs.
    NameTaken = "NAME_TAKEN", Refused;
    /// The volume is mounted, attached or opened by somebody else.
    VolumeInUse = "VOLUME_IN_USE", Refused;
    /// The file or device is not a block image that can be used.
    NotABlockImage = "NOT_A_BLOCK_IMAGE", Refused;
    /// The standby's device is smaller than the volume.
    DeviceTooSmall = "DEVICE_TOO_SMALL", Refused;
    /// The disk of this host is full.
    DiskFull = "DISK_FULL", Failed;
    /// The disk of the standby is full; the last committed generation stays.
    StandbyDiskFull = "STANDBY_DISK_FULL", Failed;
    /// The device under the name is not the one that was recorded.
    IdentityChanged = "IDENTITY_CHANGED", Refused;
    /// An input or output error of a device or file.
    IoError = "IO_ERROR", Failed;
    /// A flush failed; what was written since the last good one is not trusted again.
    FlushFailed = "FLUSH_FAILED", Failed;
    /// Stored bytes do not match their checksum or digest.
    Corrupt = "CORRUPT", Failed;
    /// The kernel lacks what the tracker needs (BTF, BPF, a tracepoint).
    KernelUnsupported = "KERNEL_UNSUPPORTED", Refused;
    /// The tracker's self-test missed a write.
    TrackerBlind = "TRACKER_BLIND", Refused;
    /// The set of changed blocks is in doubt: a full comparison follows.
    TrackerDoubt = "TRACKER_DOUBT", Failed;
    /// The freeze passed its deadline and was undone; that cut is discarded.
    FreezeTimeout = "FREEZE_TIMEOUT", Failed;
    /// The cut could not be shown to be exact and was discarded.
    CutNotExact = "CUT_NOT_EXACT", Failed;
    /// No connection to the peer.
    PeerUnreachable = "PEER_UNREACHABLE", Failed;
    /// The peer is not the one that was paired, or has no right to what it asks.
    PeerNotTrusted = "PEER_NOT_TRUSTED", Refused;
    /// The peer speaks another version of the protocol.
    VersionMismatch = "VERSION_MISMATCH", Refused;
    /// What the peer sent breaks the protocol; the connection is closed.
    ProtocolError = "PROTOCOL_ERROR", Failed;
    /// The pairing code is wrong, used or too old.
    PairingFailed = "PAIRING_FAILED", Refused;
    /// The other side holds a higher epoch: this side must not serve.
    StaleEpoch = "STALE_EPOCH", Refused;
    /// The generation does not follow the standby's last one.
    ChainBroken = "CHAIN_BROKEN", Refused;
    /// The standby has no whole generation to promote.
    NothingCommitted = "NOTHING_COMMITTED", Refused;
    /// The operation belongs to the other role.
    WrongRole = "WRONG_ROLE", Refused;
    /// The peer, when asked, still serves the group.
    PeerAlive = "PEER_ALIVE", Refused;
    /// The image is not on the standby, or is not the pinned one.
    ImageMissing = "IMAGE_MISSING", Failed;
    /// The image's content is not what its pin says.
    ImageMismatch = "IMAGE_MISMATCH", Refused;
    /// A container's recipe asks for rights on this host that its policy does not give.
    PolicyRefused = "POLICY_REFUSED", Refused;
    /// Docker does not answer or refused.
    DockerError = "DOCKER_ERROR", Failed;
    /// A container did not start or did not become healthy.
    ContainerFailed = "CONTAINER_FAILED", Degraded;
    /// The file system of a volume cannot be repaired without a person.
    FileSystemDamaged = "FILE_SYSTEM_DAMAGED", Failed;
    /// A child program is missing or failed.
    ToolFailed = "TOOL_FAILED", Failed;
    /// Verification found blocks that differ.
    VerifyMismatch = "VERIFY_MISMATCH", Degraded;
    /// The operation took longer than it was allowed to.
    TimedOut = "TIMED_OUT", Failed;
    /// An assertion of ours does not hold: the work stops, the data is kept.
    Internal = "INTERNAL", Failed;
}

/// A fault: what, why and what next, with a stable code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The stable code.
    pub code: Code,
    /// The thing it happened to (a path, a volume, a peer), in words.
    pub thing: String,
    /// Why.
    pub cause: String,
    /// What the reader can do about it.
    pub next: String,
}

impl Fault {
    /// A fault of `code` about `thing`, because of `cause`; `next` says what helps.
    pub fn new(code: Code, thing: impl Into<String>, cause: impl Into<String>, next: impl Into<String>) -> Self {
        Fault { code, thing: thing.into(), cause: cause.into(), next: next.into() }
    }
    /// An operating system error about `thing`; a full disk gets its own code.
    pub fn io(thing: impl Into<String>, error: &std::io::Error) -> Self {
        let full = matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded);
        let (code, next) = match full {
            true => (Code::DiskFull, "free space on that file system and try again"),
            false => (Code::IoError, "see the kernel log (dmesg) for the device's own words"),
        };
        Fault::new(code, thing, error.to_string(), next)
    }
    /// A broken assertion of ours.
    pub fn internal(thing: impl Into<String>, cause: impl Into<String>) -> Self {
        Fault::new(Code::Internal, thing, cause, "please report this with the agent's log; no data was dropped")
    }
    /// What the peer or a file said is not what the format allows.
    pub fn protocol(cause: impl Into<String>) -> Self {
        Fault::new(Code::ProtocolError, "the peer's message", cause, "the connection is closed and tried again")
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}; {} [{}]", self.thing, self.cause, self.next, self.code.as_str())
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_unique_and_prints_as_it_serialises() {
        let mut seen = std::collections::BTreeSet::new();
        for code in Code::ALL {
            assert!(seen.insert(code.as_str()), "{code:?} twice");
            assert_eq!(serde_json::to_string(code).unwrap(), format!("\"{}\"", code.as_str()));
        }
    }

    #[test]
    fn a_fault_is_one_sentence_with_its_code() {
        let fault = Fault::new(Code::VolumeInUse, "volume pgdata", "it is mounted on /mnt", "stop its container");
        assert_eq!(fault.to_string(), "volume pgdata: it is mounted on /mnt; stop its container [VOLUME_IN_USE]");
    }
}
